"""python -m packtrain"""

import sys

from packtrain.cli import main

sys.exit(main())
