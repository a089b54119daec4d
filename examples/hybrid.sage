// One instance does both phases: chunks of prompts fill the steps that decodes leave room in.

model tiny from "models/tiny"

cluster laptop {
  device cpu kind cpu memory 4GiB
  instance both0 role both on cpu engine torch kv_blocks 512 block 16 budget 128 max_batch 32
}

serve mode hybrid chunk 32 horizon 16 stop end-of-text {
  request "story" prompt "In a small house by the sea, there lived" generate 64
  request "long" tokens 300 generate 32
  request "hot" prompt "Question: What is the opposite of hot?\nAnswer:" generate 16
  request "dice" prompt "This is the story of" generate 48 temperature 0.8 top_k 40 seed 7
}
