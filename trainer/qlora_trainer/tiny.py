"""The name of `smoke_model` in release 0.1.0, whose chart imports it for its test."""

from qlora_trainer.smoke_model import main, write

__all__ = ["main", "write"]

if __name__ == "__main__":
    raise SystemExit(main())
