"""The commands of `streamctl`, a file each: options, one library call, a rendering."""
