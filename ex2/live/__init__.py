"""A trained model elsewhere: in a page that samples by itself, as safetensors, as ONNX."""
