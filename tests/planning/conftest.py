from tests.training.conftest import blend, world

__all__ = ["blend", "world"]
