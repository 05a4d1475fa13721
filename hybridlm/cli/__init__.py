"""The commands of `python -m hybridlm`, one file each."""
