"""Evidence: next items of other users, text neighbours and similar histories."""
