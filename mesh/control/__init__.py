"""The control plane: follows Consul and serves xDS to Envoy and to gRPC's own client in every service."""
