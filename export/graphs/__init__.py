"""Making ONNX graphs from torch modules."""
