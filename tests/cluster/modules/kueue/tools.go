//go:build tools

// Package tools names the program that the test cluster builds, so that go.mod and go.sum lock it.
package tools

import _ "sigs.k8s.io/kueue/cmd/kueue"
