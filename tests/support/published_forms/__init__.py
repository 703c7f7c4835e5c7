"""Published models made small, as data: how their files are laid out, and what becomes of them."""
