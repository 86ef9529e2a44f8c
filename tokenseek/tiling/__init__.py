"""Some rows of a layer at a time, where nothing of them is kept: tiles, their arguments and their attention."""
