#!/bin/sh
# A mentor between the teacher and the student (Mentor-KD, arXiv 2410.09037): docs/select.md, "Mentors". A bigger student of the
# same family learns from the teacher's rationales, says three more to each question, and the small student learns from both.
# Not measured: the commands are run on tiny models only. Each goes on where it stopped, so the script may be started again.
#   TRAIN=data/svamp.jsonl TEST=data/svamp-test.jsonl sh recipes/mentors.sh
set -eu
: "${TRAIN:=data/svamp.jsonl}" "${TEST:=data/svamp-test.jsonl}" "${OUT:=runs/mentors}"
: "${MENTOR:=HuggingFaceTB/SmolLM2-360M}" "${STUDENT:=HuggingFaceTB/SmolLM2-135M}"
: "${MENTOR_OPTIONS:=--max-steps 400}" "${STUDENT_OPTIONS:=--max-steps 400}" # of train, as many as you like
mkdir -p "$OUT"
# 1. The mentor: every rationale of the teacher, and reasoning before the answer.
# shellcheck disable=SC2086
qcrd-fast train --data "$TRAIN" --student "$MENTOR" --method sft-all --reasoning-task \
  --output-dir "$OUT/mentor" --resume auto $MENTOR_OPTIONS
# 2. Three samples a question at T = 0.7, by the prompt that the mentor was trained with.
printf 'reason: {context}{question}' > "$OUT/reason.txt"
qcrd-fast collect --questions "$TRAIN" --teacher "$OUT/mentor/final" --api completions --template "$OUT/reason.txt" \
  --num-samples 3 --temperature 0.7 --output "$OUT/samples.jsonl"
# 3. Pooled with the teacher's; what ends in the label is a positive, the rest are negatives.
qcrd-fast prepare "$TRAIN" "$OUT/samples.jsonl" --split-by gold --output "$OUT/train.jsonl"
# 4. The student.
# shellcheck disable=SC2086
qcrd-fast train --data "$OUT/train.jsonl" --test-data "$TEST" --student "$STUDENT" \
  --output-dir "$OUT/student" --resume auto $STUDENT_OPTIONS
