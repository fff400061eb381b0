"""Files on disk: indexed tars, copies of remote shards, and a cache of decoded images."""
