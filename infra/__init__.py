"""Starting, watching, operating."""
