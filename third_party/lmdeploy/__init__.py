"""The lmdeploy that is patched: which (VERSION), and how to look into its wheels."""
