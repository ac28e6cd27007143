"""Files that are not on a claim: the Hub's and S3's, one download for both, and where they lie in a workspace."""
