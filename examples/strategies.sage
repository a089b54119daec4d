// Strategies written as expressions; docs/language.md says what they may say. One of them serves,
// and any other can be tried:  sagec run examples/strategies.sage --strategy deadline-first

// What the built-in `fifo` does.
strategy in-turn {
  order by arrival
}

// What the built-in `priority` does: vLLM's rules of preemption.
strategy important-first {
  order by priority, arrival
  place by least-load
  preempt max priority, latest
}

// Short prompts first, as far as they are not cached; a twentieth of the KV is kept for outputs.
strategy shortest-first {
  order by prompt_tokens - cached_tokens, arrival
  admit while kv_free > 5%
  preempt max priority, latest when kv_free < 2%
}

// The earliest deadline first; what can no longer be in time is told so at once.
strategy deadline-first {
  order by deadline, arrival
  reject when slack < 0ms and output_tokens == 0 tokens
  preempt max deadline, latest
}

// Requests that have waited long for what little they need go first (highest response ratio).
strategy response-ratio {
  order by (waited + prefill_time) / max(prefill_time, 1ms) desc
}

// Batch requests only fill what chats leave: at most eight of them wait or run at a time.
strategy chats-first {
  order by tenant == "batch", arrival
  admit while tenant != "batch" or running < 8
  preempt max priority, latest when kv_free < 10% and tenant == "batch"
}

// Prompts go where they are computed soonest, outputs where there is room to grow.
strategy soonest-prefill {
  order by arrival
  prefill on min(prefill_time), min(load)
  decode on max(kv_free), min(running)
  chunk 32
}

// Small chunks and short plans while requests with promised token times run.
strategy small-steps {
  order by deadline, arrival
  mode hybrid
  chunk 16
  horizon 8
}

// One of sagec's strategies with other options.
strategy calm from adaptive {
  dwell_ms 8s
  long_steps 48
}

model tiny from "models/tiny"

cluster laptop {
  device cpu kind cpu memory 4GiB
  instance both0 role both on cpu engine torch kv_blocks 512 block 16 budget 128 max_batch 32
}

serve on laptop with shortest-first mode hybrid chunk 64 stop end-of-text {
  request "long" tokens 300 generate 16 priority 2
  request "story" prompt "In a small house by the sea, there lived" generate 48 ttft 2s
  request "hot" prompt "Question: What is the opposite of hot?\nAnswer:" generate 16 ttft 1s
  request "table" tokens 200 generate 24 tenant batch priority 1
}
