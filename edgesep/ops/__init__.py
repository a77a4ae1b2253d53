"""The contracts of custom operators (ONNX domain ``edgesep``): shapes, numpy reference, torch form."""
