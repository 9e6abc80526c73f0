"""The HTTP server, its models in processes of their own, the store, and the page."""
