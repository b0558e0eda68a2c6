"""One file per architecture, named by `model_type`; shared building blocks in `blocks`."""
