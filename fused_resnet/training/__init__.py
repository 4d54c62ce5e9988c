"""`fused-resnet train`, `eval` and `export`: networks trained on one device or many, with nothing lost on the way."""
