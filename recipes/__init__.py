"""The choices of every option group, one YAML file each; registered with Hydra by qatlab.config."""
