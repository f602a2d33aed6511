"""The same requests over gRPC: `headrace serve --grpc-port`."""
