"""Data sets, one file each: `NAME(root, *, settings...) -> Dataset`."""
