// Reads a Modelfile and conversations (JSON on standard input: lists of messages) with Ollama's own code, and prints
// what it reads: {"commands": [{"Name", "Args"}, ...], "texts": [each conversation in the file's template]}.
package main

import (
	"encoding/json"
	"log"
	"os"
	"strings"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/parser"
	"github.com/ollama/ollama/template"
)

func main() {
	file, err := os.Open(os.Args[1])
	check(err)
	parsed, err := parser.ParseFile(file)
	check(err)
	var conversations [][]api.Message
	check(json.NewDecoder(os.Stdin).Decode(&conversations))
	texts := []string{}
	for _, command := range parsed.Commands {
		if command.Name != "template" {
			continue
		}
		read, err := template.Parse(command.Args)
		check(err)
		for _, messages := range conversations {
			var text strings.Builder
			check(read.Execute(&text, template.Values{Messages: messages}))
			texts = append(texts, text.String())
		}
	}
	check(json.NewEncoder(os.Stdout).Encode(map[string]any{"commands": parsed.Commands, "texts": texts}))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
