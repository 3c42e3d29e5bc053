"""Figures: one file each, `data(frame)` for the numbers and `draw(data)` for the picture."""
