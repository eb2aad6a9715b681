"""One module per `depo` command; thin over the package."""
