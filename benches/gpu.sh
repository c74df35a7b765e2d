#!/usr/bin/env bash
# One GPU, measured from prebuilt binaries in under nine minutes: correctness of the registered kernels, ceilings, tuning, and
# the benchmark suites, into a folder fit for benches/results/<date>-<gpu>/. With --bundle: makes the folder to carry there.
#
# Runs where there is nothing but bash, coreutils and a driver. Every part is bounded by a time of its own and by what is left
# of the whole, and a part that fails or is stopped does not stop the next. Invariants: every figure comes from the adapter that
# is named at the top of the summary; what was not measured is said to be so; no path or user name of the machine is written.
#
# Seconds of each part. What a part leaves over goes to those after it: a part must end when the sum down to its line is up.
#
#   part            full  quick   what it runs
#   env               10     10   adapters, driver, processor
#   correctness      110    120   every kernel x tile x epilogue in random order until 35 s (quick: 8 s) are up; all other GPU tests
#   ceilings          15     15   multiply-adds, cooperative matrices, copy
#   tune              60     20   sparse24 tune, f16 for 30 s and f32 for 15 s; quick: 4 s each
#   square-f32        50     25   1024, 2048, 4096; quick: 64, 128
#   square-f16        45     25   the same
#   bert-large        60     15   32 and 512 tokens, f32 and f16; quick: layers an eighth as wide
#   llama-8b          85     15   1 and 512 tokens, f16; quick: a thirty-second
#   tokens            90     15   n = 1 to 4096 for llama-8b.q_o, f16; quick: 1 to 4 and a sixteenth
#   together         525    260
set -euo pipefail

readonly PARTS=(env correctness ceilings tune square-f32 square-f16 bert-large llama-8b tokens)
readonly SECONDS_FULL=(10 110 15 60 50 45 60 85 90)
readonly SECONDS_QUICK=(10 120 15 20 25 25 15 15 15)
# The whole, start and end included: what is promised less the grace of a command that does not stop when told to.
readonly TOTAL=530

usage() {
    cat <<'USAGE'
usage: benches/gpu.sh [--quick] [--parts LIST] [--device NAME] [--bin DIR] OUT
       benches/gpu.sh --bundle DIR

Measures one GPU in under nine minutes and writes raw JSON, the environment and a summary (README.md) into the folder
OUT, which must be new or empty. Needs bash, coreutils and a Vulkan driver: no toolchain, no network.

  --quick        tiny shapes and short samples: to see that everything runs, on software drivers too
  --parts LIST   only these, comma-separated: env, correctness, ceilings, tune, square-f32, square-f16, bert-large,
                 llama-8b, tokens; also square (both), f32, f16, bert, llama. env is always among them
  --device NAME  the first adapter whose name contains NAME; without it the first that is no software driver
  --bin DIR      folder of sparse24, and of the test binaries gpu-tests-ops and -gpu for the part correctness;
                 without it this script's own folder if it is a bundle, else target/release
  --bundle DIR   build all of that (needs Rust) and copy it with this script into the new folder DIR, which then can be
                 carried to a bare machine of the same architecture: DIR/gpu.sh OUT

Exit codes: 0 all parts are fine, 1 a part failed or ran out of time, 2 usage, 3 a result failed verification.
USAGE
}

say() { printf '%s\n' "$*"; }
die() {
    printf 'gpu.sh: %s\n' "$*" >&2
    exit 1
}
misused() {
    printf 'gpu.sh: %s (--help says more)\n' "$*" >&2
    exit 2
}

# ---------------------------------------------------------------------------------------------------- bundle

# Prints the Vulkan loader of this machine, which a bare machine with a GPU driver may lack.
find_loader() {
    local line
    while read -r line; do
        case $line in
            'libvulkan.so.1 ('*x86-64*' => '* | 'libvulkan.so.1 ('*AArch64*' => '*)
                say "${line##* => }"
                return 0
                ;;
        esac
    done < <(PATH="$PATH:/usr/sbin:/sbin" ldconfig -p 2>/dev/null)
    return 1
}

# executable TEST: the path that cargo's JSON on stdin gives for a test.
executable() {
    local line path
    while IFS= read -r line; do
        if [[ $line == *'"kind":["test"]'*"\"name\":\"$1\""* && $line == *'"executable":"'* ]]; then
            path=${line##*'"executable":"'}
            say "${path%%\"*}"
            return 0
        fi
    done
    return 1
}

bundle() {
    local dir=$1 built name target commit loader
    command -v cargo >/dev/null || die "cargo is missing: --bundle builds, and needs Rust"
    if [[ -e $dir && ! -d $dir ]] || [[ -n $(ls -A "$dir" 2>/dev/null) ]]; then
        die "$dir is there already: a bundle goes into a new or empty folder"
    fi
    mkdir -p "$dir"
    dir=$(cd "$dir" && pwd)
    cd "$here/.."
    say "==> building (release)"
    cargo build --locked --release
    built=$(cargo test --locked --release --no-run --message-format=json --test gpu --test ops)
    target=$(cargo metadata --locked --no-deps --format-version 1)
    target=${target##*'"target_directory":"'}
    cp "${target%%\"*}/release/sparse24" "$dir/sparse24"
    for name in gpu ops; do
        cp "$(executable "$name" <<<"$built")" "$dir/gpu-tests-$name" || die "cargo named no executable of the test $name"
    done
    strip "$dir"/sparse24 "$dir"/gpu-tests-* 2>/dev/null || say "    no strip here: the binaries keep their symbols"
    cp "$here/gpu.sh" "$dir/gpu.sh"
    chmod +x "$dir/gpu.sh"
    if loader=$(find_loader); then
        mkdir -p "$dir/lib"
        cp "$(readlink -f "$loader")" "$dir/lib/libvulkan.so.1"
    else
        say "    no Vulkan loader here: the other machine must have its own"
    fi
    commit=$(git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null) || commit=unknown
    {
        say "version: $("$dir/sparse24" -V)"
        say "commit: $commit"
        say "built: $(date -u +%Y-%m-%dT%H:%M:%SZ) with $(rustc --version), $(uname -sm)"
    } >"$dir/BUNDLE"
    say "==> $dir: $(du -sm "$dir" | cut -f1) MiB"
    du -ak "$dir" | while read -r size name; do
        [[ -d $name ]] || printf '%8d KiB  %s\n' "$size" "${name#"$dir/"}"
    done
}

# ---------------------------------------------------------------------------------------------------- arguments

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
quick='' parts='' wanted='' bin='' out='' device_given=''
# What the summary says was typed, without this machine's paths.
typed=gpu.sh

while (($#)); do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --quick)
            quick=1
            typed+=" --quick"
            ;;
        --parts | --device | --bin | --bundle)
            (($# > 1)) || misused "$1 needs a value"
            case $1 in
                --parts) parts=$2 typed+=" --parts $2" ;;
                --device) wanted=$2 device_given=1 typed+=" --device $(printf %q "$2")" ;;
                --bin) bin=$2 ;;
                --bundle)
                    (($# == 2)) || misused "--bundle DIR stands alone"
                    bundle "$2"
                    exit 0
                    ;;
            esac
            shift
            ;;
        -*) misused "unknown option $1" ;;
        *)
            [[ -z $out ]] || misused "more than one OUT: $out and $1"
            out=$1
            ;;
    esac
    shift
done
[[ -n $out ]] || misused "OUT is missing"

declare -A selected=([env]=1)
if [[ -z $parts ]]; then
    for part in "${PARTS[@]}"; do selected[$part]=1; done
else
    IFS=, read -ra names <<<"$parts"
    for name in "${names[@]}"; do
        case $name in
            square) selected[square-f32]=1 selected[square-f16]=1 ;;
            f32 | f16) selected[square-$name]=1 ;;
            bert) selected[bert-large]=1 ;;
            llama) selected[llama-8b]=1 ;;
            *)
                [[ " ${PARTS[*]} " == *" $name "* ]] || misused "--parts: there is no $name; there are ${PARTS[*]}"
                selected[$name]=1
                ;;
        esac
    done
fi

if [[ -z $bin ]]; then
    bin=$here
    [[ -x $bin/sparse24 ]] || bin=${CARGO_TARGET_DIR:-$here/../target}/release
fi
[[ -x $bin/sparse24 ]] || die "$bin holds no sparse24: --bin says where it is, --bundle builds it"
bin=$(cd "$bin" && pwd)

if [[ -e $out && ! -d $out ]] || [[ -n $(ls -A "$out" 2>/dev/null) ]]; then
    die "$out is there already: results go into a new or empty folder"
fi
mkdir -p "$out"
# From here on all names are relative to OUT, so that no path of this machine gets into a command of the JSON.
cd "$out"
out=$(pwd)
PATH=$bin:$PATH
# Or the suites would run on what this machine's user has tuned before.
export SPARSE24_CACHE=cache

case $(PATH="$PATH:/usr/sbin:/sbin" ldconfig -p 2>/dev/null) in
    *libvulkan.so.1*) ;;
    *) [[ ! -e $bin/lib/libvulkan.so.1 ]] || export LD_LIBRARY_PATH="$bin/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" ;;
esac
# Drivers complain on standard error where this is unset.
if [[ -z ${XDG_RUNTIME_DIR:-} ]]; then
    XDG_RUNTIME_DIR=$(mktemp -d)
    export XDG_RUNTIME_DIR
    trap 'rm -rf "$XDG_RUNTIME_DIR"' EXIT
fi

# What the binaries were built from.
version=$(sparse24 -V) || die "sparse24 does not run here"
commit='' built=''
if [[ -e $bin/BUNDLE ]]; then
    while IFS= read -r line; do
        case $line in
            commit:*) commit=${line#commit: } ;;
            built:*) built=${line#built: } ;;
        esac
    done <"$bin/BUNDLE"
else
    commit=$(git -C "$here" describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null) || commit=unknown
fi
# For the JSON: the tree may be elsewhere, or have moved on since the binaries were built.
[[ $commit == unknown ]] || export SPARSE24_COMMIT=$commit

# ---------------------------------------------------------------------------------------------------- the adapter

# Values of the chosen adapter, from `sparse24 devices --json`: one field a line, an entry from { to }.
selector='' adapter='' kind='' driver='' backend='' f16='' seen=()

# value LINE: the JSON string or word after the colon.
value() {
    local text=${1#*: }
    text=${text%,}
    if [[ $text == '"'*'"' ]]; then
        text=${text:1:${#text}-2}
        text=${text//'\"'/'"'}
        text=${text//\\\\/\\}
    fi
    say "$text"
}

takes() { # whether the entry that was read is the one that is asked for
    case $d_kind in
        cpu) return 1 ;;
        software) [[ -n $device_given && ${d_name,,} == *"${wanted,,}"* ]] ;;
        *) [[ -z $device_given || ${d_name,,} == *"${wanted,,}"* ]] ;;
    esac
}

choose() {
    local line d_device='' d_name='' d_kind='' d_driver='' d_backend='' d_f16=''
    adapter='' seen=()
    while IFS= read -r line; do
        case $line in
            '    {') d_device='' d_name='' d_kind='' d_driver='' d_backend='' d_f16='' ;;
            '      "device": '*) d_device=$(value "$line") ;;
            '      "name": '*) d_name=$(value "$line") ;;
            '      "kind": '*) d_kind=$(value "$line") ;;
            '      "driver": '*) d_driver=$(value "$line") ;;
            '      "backend": '*) d_backend=$(value "$line") ;;
            '        "f16": '*) d_f16=$(value "$line") ;;
            '    }' | '    },')
                [[ $d_kind == cpu ]] || seen+=("$d_name ($d_kind)")
                if [[ -z $adapter ]] && takes; then
                    selector=$d_device adapter=$d_name kind=$d_kind
                    driver=$d_driver backend=$d_backend f16=$d_f16
                fi
                ;;
        esac
    done <devices.json
}

list_devices() {
    timeout -k 5 60 sparse24 devices --json >devices.json 2>devices.log || die "sparse24 devices failed: $(<devices.log)"
    [[ -s devices.log ]] || rm -f devices.log
    choose
}

date=$(date -u +%Y-%m-%dT%H:%M:%SZ)
[[ -z $device_given || -n $wanted ]] || misused "--device: the name is empty"
list_devices
# Containers put NVIDIA's manifest where loaders do not look.
manifest=/usr/local/nvidia/share/vulkan/icd.d/nvidia_icd.json
if [[ -z $adapter && -z ${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-} && -e $manifest ]]; then
    export VK_DRIVER_FILES=$manifest VK_ICD_FILENAMES=$manifest
    list_devices
fi
if [[ -z $adapter ]]; then
    rm -f devices.json devices.log
    ((${#seen[@]})) || die "no adapter: no Vulkan driver offers one here"
    listed=$(printf '; %s' "${seen[@]}")
    [[ -z $device_given ]] || die "no adapter's name contains '$wanted'; there are ${listed:2}"
    die "only software drivers here, which say nothing about a GPU (${listed:2}): --device NAME takes one all the same"
fi
[[ -n $selector && $selector != null ]] ||
    die "$adapter cannot be named: an adapter before it has the same name (see sparse24 devices)"
say "gpu.sh: $adapter ($kind, $backend, $driver), $version, commit $commit"

# ---------------------------------------------------------------------------------------------------- parts

# Results: a line for each part (name|status|seconds|note); files of each part; what was not measured and why.
table=() missing=()
declare -A files=()
failed='' wrong=''
# Of the part that runs: when it must be over (in seconds since the script began), and the worst that happened.
deadline=$SECONDS status=ok note=''

# left: seconds that the part, and the whole, still have.
left() {
    local part=$((deadline - SECONDS)) whole=$((TOTAL - SECONDS))
    say $((part < whole ? part : whole))
}

# worse STATUS NOTE: a later step does not hide what an earlier one did.
worse() {
    case $status/$1 in
        ok/* | skipped/failed | */wrong) status=$1 ;;
    esac
    note+=${note:+; }$2
}

# bounded SECONDS LOG COMMAND...: stdout and stderr to LOG; exit code of the command, 124 out of time, 125 no time was left.
bounded() {
    local most=$1 log=$2 remaining code=0
    shift 2
    remaining=$(left)
    most=$((most < remaining ? most : remaining))
    ((most >= 2)) || return 125
    timeout -k 3 "$most" "$@" >"$log" 2>&1 </dev/null || code=$?
    ((code != 137)) || code=124
    return "$code"
}

# bench NAME ARGUMENTS...: a run of the benchmark into NAME.json and NAME.txt.
bench() {
    local name=$1 code=0 rows line command
    shift
    command=(sparse24 bench --device "$selector" ${quick:+--quick} ${cache[@]+"${cache[@]}"} "$@" --wide --legend --json "$name.json")
    # Something of this part runs, whatever else of it was left out.
    [[ $status != skipped ]] || status=ok
    bounded 600 "$name.txt" "${command[@]}" || code=$?
    files[$part]+=" $name"
    case $code in
        0) ;;
        3) worse wrong "$name: a row failed verification" ;;
        124) worse failed "$name: stopped, out of time" ;;
        125) worse failed "$name: not started, no time was left" ;;
        *) worse failed "$name: exit code $code" ;;
    esac
    if ((code == 124 || code == 125)); then
        rm -f "$name.json"
        [[ -s $name.txt ]] || rm -f "$name.txt"
        missing+=("$name: out of time")
        return 0
    elif [[ ! -s $name.json ]]; then
        missing+=("$name: $(last_line "$name.txt")")
        return 0
    fi
    # The selector may be a part of several names, and what is measured must be what is named above.
    local on
    on=$(field "$name.json" device)
    [[ $on == "$adapter" ]] || worse failed "$name: measured on $on instead of $adapter"
    rows=0
    while IFS= read -r line; do [[ $line != *'"verified": true'* ]] || rows=$((rows + 1)); done <"$name.json"
    note+=${note:+; }"$name: $rows rows verified"
}

# field FILE NAME: the first value of that name in indented JSON.
field() {
    local line
    while IFS= read -r line; do
        if [[ $line == *"\"$2\": "* ]]; then
            value "$line"
            return 0
        fi
    done <"$1"
}

last_line() {
    local line last='no output'
    [[ -e $1 ]] || { say "$last"; return 0; }
    while IFS= read -r line; do [[ -z $line ]] || last=$line; done <"$1"
    say "$last"
}

# without_f16 NAME: whether the adapter lacks f16, said once for each run that is left out for it.
without_f16() {
    [[ $f16 != true ]] || return 1
    [[ $status != ok || -n $note ]] || status=skipped
    note+=${note:+; }"$1: the adapter has no f16"
    missing+=("$1: the adapter has no f16")
}

part_env() {
    {
        say "date: $date"
        say "adapter: $adapter ($kind)"
        say "driver: $backend, $driver"
        say "f16: $f16"
        say "version: $version"
        say "commit: $commit"
        [[ -z $built ]] || say "built: $built"
        say "system: $(uname -srm)"
        say "processor: $(processor)"
        if command -v nvidia-smi >/dev/null; then
            # No --query without fields and no -q: those print serial numbers.
            timeout 8 nvidia-smi --format=csv --query-gpu=name,driver_version,vbios_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem,temperature.gpu,utilization.gpu 2>&1 ||
                say "nvidia-smi failed"
        else
            say "nvidia-smi: not here"
        fi
    } >env.txt
    files[env]=' env'
    note="devices.json, env.txt"
}

processor() {
    local line name='' count=0
    while IFS= read -r line; do
        case $line in
            'model name'*) name=${line#*: } count=$((count + 1)) ;;
        esac
    done 2>/dev/null </proc/cpuinfo
    say "${name:-unknown}, $count threads"
}

# The kernel tests run side by side, each a process of its own: a driver that crashes takes one of them down, not all.
part_correctness() {
    local binary name kernels=() gemm=() others=() rest=() budget=35 code pids=() i
    local run=(env SPARSE24_REQUIRE_GPU=1 "SPARSE24_TEST_DEVICE=$adapter" RUST_BACKTRACE=0)
    [[ -z $quick ]] || budget=8
    files[correctness]=''
    for binary in gpu ops; do
        if [[ ! -x $bin/gpu-tests-$binary ]]; then
            worse failed "no gpu-tests-$binary in --bin"
            missing+=("correctness: there is no gpu-tests-$binary beside sparse24")
            return 0
        fi
    done
    while read -r name; do
        [[ $name == *': test' ]] || continue
        name=${name%: test}
        case $name in
            gemm::*kernels*_agree_with_the_oracle) kernels+=("$name") ;;
            gemm::*) gemm+=("$name") ;;
            *) others+=("$name") ;;
        esac
    done < <(gpu-tests-ops --ignored --list)
    ((${#kernels[@]} && ${#gemm[@]} && ${#others[@]})) || { worse failed "gpu-tests-ops lists no kernel tests"; return 0; }

    for name in "${kernels[@]}"; do
        bounded $((budget + 30)) "correctness-${name#gemm::}.txt" "${run[@]}" SPARSE24_TEST_ALL=1 \
            "SPARSE24_TEST_SECONDS=$budget" gpu-tests-ops --ignored --exact "$name" --nocapture &
        pids+=($!)
    done
    for i in "${!kernels[@]}"; do
        code=0
        wait "${pids[i]}" || code=$?
        kernel_result "${kernels[i]#gemm::}" "$code"
    done
    note+=${note:+; }"$kernels_ran of $kernels_there kernels ran"
    ((kernels_ran == kernels_there)) ||
        missing+=("correctness: $((kernels_there - kernels_ran)) of $kernels_there kernels x tiles x epilogues: time was up")
    # Matching by whole names, as one may be a part of another.
    rest=("${gemm[@]}")
    test_result gemm 75 "${run[@]}" gpu-tests-ops --ignored --exact "${rest[@]}"
    rest=("${others[@]}")
    test_result operations 60 "${run[@]}" gpu-tests-ops --ignored --exact "${rest[@]}"
    rest=()
    while read -r name; do [[ $name != *': test' ]] || rest+=("${name%: test}"); done < <(gpu-tests-gpu --ignored --list)
    test_result gpu 40 "${run[@]}" gpu-tests-gpu --ignored --exact "${rest[@]}"
}

# kernel_result TEST CODE: how many of how many kernels it ran.
kernel_result() {
    local log=correctness-$1.txt line counts='' verdict=passed
    files[correctness]+=" correctness-$1"
    [[ -e $log ]] || : >"$log"
    (($2 == 0)) || verdict="FAILED ($2)"
    while IFS= read -r line; do
        [[ $line != *' kernels ran' ]] || counts=$line
    done <"$log"
    if [[ $counts =~ ^([0-9]+)\ of\ ([0-9]+)\ kernels\ ran$ ]]; then
        kernels_ran=$((kernels_ran + BASH_REMATCH[1])) kernels_there=$((kernels_there + BASH_REMATCH[2]))
    fi
    case $2 in
        0) [[ -n $counts ]] || worse failed "$1: no count of kernels" ;;
        124 | 125)
            worse failed "$1: stopped, out of time"
            missing+=("$1: how many kernels ran, out of time")
            ;;
        101) worse wrong "$1: FAILED" ;;
        *) worse failed "$1: exit code $2" ;;
    esac
    correct+=("| $1 | ${counts:-not measured} | $verdict |")
}

# test_result NAME SECONDS COMMAND... TEST...: the other tests of a binary, in one process.
test_result() {
    local name=$1 most=$2 log=correctness-other-$1.txt code=0 line passed=0 all=${#rest[@]} bad=() verdict=passed
    shift 2
    bounded "$most" "$log" "$@" || code=$?
    files[correctness]+=" correctness-other-$name"
    [[ -e $log ]] || : >"$log"
    while IFS= read -r line; do
        case $line in
            'test '*' ... ok') passed=$((passed + 1)) ;;
            'test '*' ... FAILED') line=${line#test } bad+=("${line% ... FAILED}") ;;
        esac
    done <"$log"
    note+=${note:+; }"other tests in $name: $passed of $all passed"
    ((code == 0)) || verdict="FAILED ($code) ${bad[*]-}"
    case $code in
        0) ;;
        101) worse wrong "FAILED: ${bad[*]-}" ;;
        124 | 125)
            worse failed "stopped, out of time"
            missing+=("$((all - passed)) of $all other tests in $name: out of time")
            ;;
        *) worse failed "exit code $code" ;;
    esac
    correct+=("| other tests in \`tests/$name.rs\` | $passed of $all tests passed | $verdict |")
}

part_ceilings() {
    # Ceilings are measured at the start of every run: this one has no more than a row.
    bench ceilings --shapes 256x256x256 --ops dense
}

# What tuning finds is kept at once, so one that is stopped, or comes to its budget's end, is of use.
part_tune() {
    local dtype code shapes tokens budget help args last
    help=$(sparse24 tune --help 2>/dev/null) || {
        status=skipped note="this sparse24 has no tune"
        missing+=("tune: this sparse24 has no such command; the planner chose by its own rules")
        return 0
    }
    # f16 first: most suites are.
    for dtype in f16 f32; do
        [[ $dtype == f32 ]] || ! without_f16 tune-f16 || continue
        [[ $status != skipped ]] || status=ok
        case $quick$dtype in
            f16) shapes=bert-large,llama-8b,square tokens=512,1 budget=30 ;;
            f32) shapes=square,bert-large tokens=512 budget=15 ;;
            *) shapes=64x64x64 tokens=4 budget=4 ;;
        esac
        args=(--device "$selector" --shapes "$shapes" --tokens "$tokens" --dtype "$dtype" --ops "dense,sparse24"
            --vector "1,32" --budget "$budget" --cache cache)
        [[ -z $quick || $help != *--quick* ]] || args+=(--quick)
        code=0
        bounded $((budget + 12)) "tune-$dtype.txt" sparse24 tune "${args[@]}" || code=$?
        files[tune]+=" tune-$dtype"
        case $code in
            0)
                last=$(last_line "tune-$dtype.txt")
                note+=${note:+; }"tune-$dtype: $last"
                [[ $last != 'out of time'* ]] || missing+=("tune-$dtype: $last")
                ;;
            3) worse wrong "tune-$dtype: a result failed verification" ;;
            124 | 125)
                missing+=("tune-$dtype: not all, out of time")
                if is_tuned; then
                    note+=${note:+; }"tune-$dtype: stopped, what it had found is kept"
                else
                    worse failed "tune-$dtype: stopped before it had found anything"
                fi
                ;;
            *)
                worse failed "tune-$dtype: exit code $code"
                missing+=("tune-$dtype: $(last_line "tune-$dtype.txt")")
                ;;
        esac
    done
    # The suites look where the tuning lies, if this sparse24 can be told.
    case $(sparse24 bench --help) in
        *--cache*) ! is_tuned || cache=(--cache cache) ;;
    esac
}

# Whether the folder of caches holds what the tuner found: compiled kernels lie there, too.
is_tuned() {
    compgen -G 'cache/*.json' >/dev/null
}

part_square-f32() {
    squares f32
}

part_square-f16() {
    without_f16 square-f16 || squares f16
}

squares() {
    if [[ -n $quick ]]; then
        bench "square-$1" --shapes 64x64x64,128x128x128 --dtype "$1"
    else
        bench "square-$1" --shapes square --dtype "$1" --vector 1,4,32,128
    fi
}

part_bert-large() {
    local layers=(--shapes bert-large --tokens "32,512" --vector "1,4,32") dtype
    [[ -z $quick ]] || layers=(--shapes "128x4x128,512x4x128,128x4x512" --vector 32)
    for dtype in f16 f32; do
        [[ $dtype == f32 ]] || ! without_f16 bert-large-f16 || continue
        bench "bert-large-$dtype" "${layers[@]}" --dtype "$dtype"
    done
}

part_llama-8b() {
    local common=(--dtype f16 --ops "dense,sparse24" --vector "1,32,128")
    without_f16 llama-8b && return 0
    if [[ -n $quick ]]; then
        bench llama-8b --shapes 128x1x128,448x1x128,128x1x448 "${common[@]}"
        return 0
    fi
    # In two runs: what was measured is kept if time is up.
    bench llama-8b-n1 --shapes llama-8b --tokens 1 "${common[@]}"
    bench llama-8b-n512 --shapes llama-8b --tokens 512 "${common[@]}"
}

part_tokens() {
    local common=(--dtype f16 --ops "dense,sparse24" --vector "1,32") run n shapes
    without_f16 tokens && return 0
    if [[ -n $quick ]]; then
        bench tokens --shapes 256x1x256,256x2x256,256x4x256 "${common[@]}"
        return 0
    fi
    # In several runs, as above. A shape each, since --tokens is for whole models.
    for run in "1 2 4 8" "16 32 64" "128 256 512" "1024 2048 4096"; do
        shapes=''
        for n in $run; do shapes+=,4096x${n}x4096; done
        bench "tokens-from-${run%% *}" --shapes "${shapes:1}" "${common[@]}"
    done
}

# ---------------------------------------------------------------------------------------------------- summary

# paragraph FILE N: the Nth block of lines between empty lines.
paragraph() {
    local line at=1
    while IFS= read -r line; do
        if [[ -z $line ]]; then
            at=$((at + 1))
            ((at <= $2)) || return 0
        elif ((at == $2)); then
            say "$line"
        fi
    done <"$1"
}

# typed_in FILE: the command that a JSON says made it.
typed_in() {
    local line
    while IFS= read -r line; do
        if [[ $line == '    "command": '* ]]; then
            value "$line"
            return 0
        fi
    done <"$1"
}

ceiling() { # FILE FIELD WHAT UNIT
    local number
    number=$(field "$1" "$2")
    if [[ -z $number || $number == null ]]; then say "| $3 | not measured |"; else LC_ALL=C printf '| %s | %.4g %s |\n' "$3" "$number" "$4"; fi
}

summary() {
    local part name file from='' legend='' line
    say "# ${date%%T*}, $adapter"
    say
    while IFS= read -r line; do
        case $line in
            *': '*) say "- ${line%%: *}: ${line#*: }" ;;
            *) say "- nvidia-smi: $line" ;;
        esac
    done <env.txt
    say "- command: \`$typed OUT\`"
    say
    say "Raw files hold the command of each row. All rows are of this adapter and were verified before they were timed; rows that"
    say "failed say so. Speeds against dense are against this crate's own dense kernel."
    [[ $kind != software ]] || say "**A software driver computes on the processor: this says nothing about a GPU.**"
    [[ -z $quick ]] || say "**Run with --quick: tiny shapes and short samples, to see that everything runs, not how fast.**"
    say
    say "## Parts"
    say "| part | status | s | |"
    say "|---|---|---|---|"
    for line in "${table[@]}"; do
        IFS='|' read -r part name file from <<<"$line"
        say "| $part | $name | $file | $from |"
    done
    say
    say "## Not measured"
    if ((${#missing[@]})); then printf -- '- %s\n' "${missing[@]}"; else say "Nothing of what was asked for is missing."; fi
    say
    say "## Correctness"
    if ((${#correct[@]})); then
        say "Kernels are drawn in random order from all that are registered for this adapter, on fresh operands, until the time is up."
        say
        say "| test | ran | result |"
        say "|---|---|---|"
        printf '%s\n' "${correct[@]}"
        say "| together | $kernels_ran of $kernels_there kernels ran | |"
    else
        say "Not measured."
    fi
    say
    say "## Ceilings"
    from=''
    for file in ceilings.json *.json; do
        if [[ -z $from && -s $file && $file != devices.json ]]; then from=$file; fi
    done
    if [[ -n $from ]]; then
        say "Of \`$from\`; every file has its own."
        say
        say "| ceiling | measured |"
        say "|---|---|"
        ceiling "$from" fma_f32_tflops "f32 multiply-adds" TFLOPS
        ceiling "$from" fma_f16_tflops "f16 multiply-adds" TFLOPS
        ceiling "$from" cooperative_f16_tflops "f16 cooperative matrices, f32 sums" TFLOPS
        ceiling "$from" copy_gb_per_s "copy, read and written together" GB/s
    else
        say "Not measured."
    fi
    for part in "${PARTS[@]}"; do
        case $part in env | correctness | ceilings | tune) continue ;; esac
        say
        say "## $part"
        if [[ -z ${files[$part]:-} ]]; then
            say "Not measured."
            continue
        fi
        for name in ${files[$part]}; do
            if [[ ! -s $name.json ]]; then
                say "\`$name\`: not measured."
                continue
            fi
            say "\`$name.json\`: \`$(typed_in "$name.json")\`"
            say
            say '```text'
            paragraph "$name.txt" 2
            say '```'
            legend=$name.txt
        done
    done
    if [[ -n $legend ]]; then
        say
        say "## What the columns mean"
        say '```text'
        # The legend is the last part of the text.
        local within=''
        while IFS= read -r line; do
            if [[ $line == 'm x n x k: '* ]]; then within=1; fi
            if [[ -n $within ]]; then say "$line"; fi
        done <"$legend"
        say '```'
    fi
}

# No path of this machine in what is kept, and no kernels that its driver has compiled: results travel.
clean() {
    local file line text
    rm -f cache/*.bin
    rmdir cache 2>/dev/null || true
    for file in *.txt *.json *.log README.md; do
        [[ -s $file ]] || continue
        text=$(<"$file")
        # Where a dependency was built, as in its panics, is of no interest either.
        text=$(sed 's#[^ ]*/\.cargo/registry/src/[^/]*/##g' <<<"$text")
        for line in "$out" "$bin" "$here" ${HOME:+"$HOME"}; do
            # The root folder is no secret and part of every path.
            [[ $line == / || $text != *"$line"* ]] || text=${text//"$line"/...}
        done
        printf '%s\n' "$text" >"$file"
    done
}

correct=() cache=() kernels_ran=0 kernels_there=0
for i in "${!PARTS[@]}"; do
    part=${PARTS[i]}
    [[ -n ${selected[$part]:-} ]] || continue
    started=$SECONDS
    most=${SECONDS_FULL[i]}
    [[ -z $quick ]] || most=${SECONDS_QUICK[i]}
    deadline=$((deadline + most)) status=ok note=''
    say "==> $part (at most $(left) s)"
    if (($(left) < 2)); then
        status=failed note="not started, no time was left"
        missing+=("$part: no time was left")
    else
        "part_$part" || worse failed "broke off"
    fi
    [[ $status != failed ]] || failed=1
    [[ $status != wrong ]] || wrong=1
    table+=("$part|$status|$((SECONDS - started))|$note")
    say "    $status, $((SECONDS - started)) s: $note"
done
for part in "${PARTS[@]}"; do
    [[ -n ${selected[$part]:-} ]] || missing+=("$part: not asked for")
done
summary >README.md
clean

say
printf '%-12s  %-8s %4s\n' part status s
for line in "${table[@]}"; do
    IFS='|' read -r part name seconds _ <<<"$line"
    printf '%-12s  %-8s %4d\n' "$part" "$name" "$seconds"
done
printf '%-12s  %-8s %4d\n' together '' $SECONDS
[[ -z $wrong ]] || exit 3
[[ -z $failed ]] || exit 1
