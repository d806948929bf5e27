"""The sparsity methods, one file each over one base. `settings/methods.py` has their table."""
