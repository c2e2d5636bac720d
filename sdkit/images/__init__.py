"""Pictures, masks and depth maps, to tensors and back; sheets of pictures."""
