// Edits a picture: go run Example.go PICTURE MASK PROMPT OUT
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"time"
)

// Answer has the fields that are needed here. Output is "" or a list, according to the status.
type Answer struct {
	Status string
	ID     json.RawMessage
	Output json.RawMessage
}

func main() {
	picture, mask, prompt, out := os.Args[1], os.Args[2], os.Args[3], os.Args[4]
	answer, body := post("/api/v3/inpaint", map[string]string{
		"prompt":     prompt,
		"init_image": read(picture),
		"mask_image": read(mask),
	})
	for answer.Status == "processing" {
		time.Sleep(time.Second)
		answer, body = post(fmt.Sprintf("/api/v3/fetch/%s", answer.ID), map[string]string{})
	}
	if answer.Status != "success" {
		log.Fatalf("%s", body)
	}
	var output []string
	check(json.Unmarshal(answer.Output, &output))
	file, err := http.Get(output[0])
	check(err)
	content, err := io.ReadAll(file.Body)
	check(err)
	check(os.WriteFile(out, content, 0o644))
}

func post(path string, fields map[string]string) (answer Answer, body []byte) {
	url, isSet := os.LookupEnv("INPAINT_URL")
	if !isSet {
		url = "http://127.0.0.1:8000"
	}
	fields["key"] = os.Getenv("INPAINT_KEY")
	sent, err := json.Marshal(fields)
	check(err)
	response, err := http.Post(url+path, "application/json", bytes.NewReader(sent))
	check(err)
	body, err = io.ReadAll(response.Body)
	check(err)
	check(json.Unmarshal(body, &answer))
	return answer, body
}

func read(path string) string {
	content, err := os.ReadFile(path)
	check(err)
	return base64.StdEncoding.EncodeToString(content)
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
