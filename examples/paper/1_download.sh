#!/bin/bash
# Downloads model, encoder and the data of the three stages; the same command goes on with what is missing.
. "$(dirname "$0")/settings.sh"

model() {  # repository, folder
    [ -f "$2/config.json" ] || hf download "$1" --local-dir "$2"
}

dataset() {  # repository, one Parquet file of so many
    local name list source
    name=$(basename "$1")
    list=downloads/$name.txt
    source=(--repo "$1")
    [ -z "$LISTS" ] || source=(--list "$LISTS/$name.txt")
    python "$EXAMPLES/paper/choose_files.py" "${source[@]}" --every "$2" --seed "$SEED" > "$list.part"
    mv "$list.part" "$list"
    xargs --arg-file "$list" --delimiter '\n' hf download "$1" --repo-type dataset --local-dir "downloads/$name" --
}

mkdir -p downloads
model "$MODEL_REPO" "$MODEL"
model "$ENCODER_REPO" "$ENCODER"
hf download liuhaotian/LLaVA-Pretrain blip_laion_cc_sbu_558k.json images.zip \
    --repo-type dataset --local-dir downloads/LLaVA-Pretrain
[ -d downloads/LLaVA-Pretrain/images ] || {
    python -m zipfile -e downloads/LLaVA-Pretrain/images.zip downloads/LLaVA-Pretrain/images.part
    mv downloads/LLaVA-Pretrain/images.part downloads/LLaVA-Pretrain/images
}
dataset HuggingFaceM4/FineVision "$FINEVISION_EVERY"
dataset lmms-lab/LLaVA-OneVision-Data "$ONEVISION_EVERY"
