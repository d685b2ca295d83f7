"""Where the error comes from: site by site, tensor by tensor, in words and with a remedy."""
