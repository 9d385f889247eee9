"""The chunked transfer of files: both machines, the chunk map and the wire form."""
