"""The built-in studies, one YAML file each."""
