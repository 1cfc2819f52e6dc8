// An HTTP server in Go: answers /CONNECTION/QUESTION if the question is the next one of that connection.
package main

import (
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"time"
)

var (
	lock sync.Mutex
	last = map[int]int{}
)

// Keeps the scheduler at work: goroutines that never yield are preempted by signals, and others wait for timers.
func busy() {
	for {
		sum := 0
		for n := 0; n < 20_000_000; n++ {
			sum += n
		}
		time.Sleep(time.Duration(1+sum%2) * 5 * time.Millisecond)
		_ = make([]byte, 1<<20)
		runtime.Gosched()
	}
}

func main() {
	go busy()
	http.HandleFunc("/", func(answer http.ResponseWriter, request *http.Request) {
		var connection, question int
		fmt.Sscanf(request.URL.Path, "/%d/%d", &connection, &question)
		lock.Lock()
		before := last[connection]
		last[connection] = question
		lock.Unlock()
		if question != before+1 {
			http.Error(answer, fmt.Sprintf("%d after %d", question, before), 500)
			return
		}
		fmt.Fprintf(answer, "%d:%d:%s", connection, question, strings.Repeat("x", question%1000))
	})
	panic(http.ListenAndServe("0.0.0.0:8000", nil))
}
