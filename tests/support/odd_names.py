"""A name with what means something in addresses, patterns, URIs, SQL and shells: whoever pastes paths together reads or writes elsewhere."""

ODD_NAME = "a#b?c%20 d'\u00e9\"&;x"
