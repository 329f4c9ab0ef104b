import benchmarks.peers  # noqa: F401 (makes torchvision importable)
