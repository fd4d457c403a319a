# How the tasks of a Slurm job end, and what comes of it. slurm_job.py sets the variables in small letters before this.
#
#   the tasks                                             the job
#   finished                                              is done
#   were refused (CptError)                               has failed, and is not tried again
#   were told to stop, and saved or had not begun         comes back; exit code 75 where it must not
#   were told to stop, and ended unsaved                  comes back, and goes on from the last checkpoint
#   crashed                                               comes back max_restarts times, then it has failed
#   were cancelled                                        does not come back

export TORCHX_MAX_RETRIES=0  # NeMo-Run's script counts requeues for restarts, preemptions among them
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
id=${id:-$SLURM_JOB_ID}  # the number alone may stand for a whole array
crashes=$job/crashes-$SLURM_JOB_ID unsaved=$job/unsaved-$SLURM_JOB_ID
rm -f "$marker" "$refusal"

say() { echo "nemo_cpt: $*"; }

# Why Slurm ends the job: it was cancelled, requeued (and comes back by itself), preempted, or is at its time limit.
reason() {
    local facts end
    facts=" $(SLURM_TIME_FORMAT=standard scontrol show job -o "$id" 2>/dev/null) "
    fact() { local rest=${facts#* "$1"=}; [ "$rest" = "$facts" ] || echo "${rest%% *}"; }
    case $(fact JobState) in
        "") ;;
        RUNNING)
            end=$(date -d "$(fact EndTime)" +%s 2>/dev/null || echo 99999999999)
            if [[ $(fact PreemptTime) == [0-9]* ]]; then
                echo preempted
            elif [ "$preempt_seconds" -gt 0 ] && [ $((end - $(date +%s))) -le $((preempt_seconds + 60)) ]; then
                echo "time limit"  # Slurm signals the tasks up to 60 s early
            fi ;;
        *)
            if [ "$(fact Restarts)" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
                echo requeued
            elif [ "$(fact Reason)" = TimeLimit ]; then
                echo "time limit"
            else
                echo cancelled
            fi ;;
    esac
}

# bash runs no trap while a command is in the foreground, and Slurm may kill this script before the tasks have ended.
srun() {
    local step status code=127
    command srun "$@" &
    step=$!
    while :; do
        signalled=
        wait "$step"
        status=$?
        [ $status -eq 127 ] || code=$status
        [ -n "$signalled" ] || break
    done
    # srun ends the other tasks when one has crashed: those that had not begun take that for a stop.
    [ -s "$marker" ] && [ $code -ne 0 ] && rm -f "$marker"
    [ -e "$marker" ] && code=75
    return $code
}

on_term() {
    signalled=1
    why=$(reason)
    case $why in
        "time limit") too_often || come_back ;;
        cancelled) forget_secrets ;;
    esac
}

leave() {
    local code=$?
    set +e
    why=$(reason)
    if [ -e "$refusal" ]; then
        fail
    elif [ -e "$marker" ]; then
        say "stopped ahead of the end${why:+ ($why)}, $(grep . "$marker" || echo saved)"
        [ -s "$marker" ] || rm -f "$unsaved"
        stop
    elif [ $code -eq 0 ]; then
        end_chain finished
    elif [ -n "$why" ]; then
        say "told to stop ($why), and ended unsaved (exit code $code); it goes on from the last checkpoint"
        stop
    elif [ "$(count "$crashes")" -le "$max_restarts" ]; then
        say "exit code $code; restart $(cat "$crashes") of $max_restarts"
        scontrol requeue "$id" || fail
    else
        fail
    fi
    exit $code
}

stop() {
    if [ "$why" = cancelled ]; then
        forget_secrets
    elif too_often; then
        say "no checkpoint was written before $limits time limits in a row: give slurm() more preempt_seconds or time"
        fail
    elif ! come_back; then
        forget_secrets
    fi
}

# Whether this is one time limit too many before which nothing was saved: it would go on like that for ever.
too_often() {
    [ "$why" = "time limit" ] && [ ! -e "$marker" -o -s "$marker" ] || return 1
    limits=${limits:-$(count "$unsaved")}
    [ "$limits" -ge 3 ]
}

come_back() {
    [ "$why" != requeued ] || return 0
    [ "$comes_back" -eq 1 ] || return 1
    scontrol requeue "$id" && return 0
    say "Slurm does not take the job back; submit it again, it goes on from there"
    return 1
}

fail() { end_chain failed; }

end_chain() {
    touch "$job/$1"
    jobs_behind=0
    forget_secrets
}

# Unless another start, a job of the chain or a task of the array still needs them.
forget_secrets() {
    [ "$jobs_behind" -eq 0 ] || return
    [ -z "$SLURM_ARRAY_JOB_ID" ] || [ "$(unset ${!SQUEUE_@}; squeue -h -r -j "$SLURM_ARRAY_JOB_ID" -t PD,R,S | wc -l)" -le 1 ] || return
    rm -f "$job/secrets.env"
}

count() {
    local number=$(($(cat "$1" 2>/dev/null || echo 0) + 1))
    echo "$number" > "$1"
    echo "$number"
}

trap on_term TERM
trap leave EXIT
