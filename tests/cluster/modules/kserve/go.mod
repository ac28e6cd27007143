module qlora.dev/tests/cluster/kserve

go 1.26.8

require github.com/kserve/kserve v0.20.0
