//go:build tools

// Package tools names the program that lists what the images hold, so that go.mod and go.sum lock it.
package tools

import _ "github.com/anchore/syft/cmd/syft"
