//go:build tools

// Package tools names the registry that adapters are pushed to, so that go.mod and go.sum lock it.
package tools

import _ "github.com/distribution/distribution/v3/cmd/registry"
