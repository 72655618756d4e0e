"""Data sets by name: what their authors published, row by row as examples."""
