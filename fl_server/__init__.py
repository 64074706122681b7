"""The data-centre side: drives rounds, builds and signs versions, watches the fleet."""
