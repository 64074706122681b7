"""Documents that cross the wire or the disk, each with its parser; hostile input raises ContractError."""
