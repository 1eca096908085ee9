"""Policy families. Each implements algorithms/policies/base.py."""
