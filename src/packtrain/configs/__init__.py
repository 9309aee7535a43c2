"""Settings: what there is to set (a file a section), how it is read, and what is wrong with it. Imports no torch."""
