"""The local API over gRPC, if it is turned on (`edge-fl[grpc]`): another door to what `edge_agent.http` does."""
