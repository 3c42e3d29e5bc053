"""Networks, one file each: `NAME(input_shape, classes, *, settings...) -> torch.nn.Module`."""
