"""What sagec patches, and with what: `lmdeploy/` says which and whence, `patches/` how."""
