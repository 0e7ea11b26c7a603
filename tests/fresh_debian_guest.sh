#!/bin/bash
# What tests/fresh_debian.sh runs in the virtual machine, as root, after its boot.
set -uo pipefail
trap 'systemctl poweroff' EXIT
fail() { echo "FRESH FAILED: $*"; journalctl -u spiked -u spiked-jobs --no-pager -o cat | tail -40; exit 1; }
shown() { systemctl show -p "$2" --value "$1"; }
echo "FRESH $(. /etc/os-release; echo "$PRETTY_NAME"), kernel $(uname -r), $(systemctl --version | head -1), $(python3 --version), control groups $(stat -fc %T /sys/fs/cgroup)"
cd /root
spiked simulate --wire maxwell --electrodes 4x4 --cycle --duration-s 3600 --map /etc/network.cfg --wait-s 1200 > /root/simulate.log 2>&1 &
while [ ! -s /etc/network.cfg ]; do sleep 0.5; done
spiked init /etc/spiked/rig.toml --source maxwell --name rigA --sessions /data/sessions --electrode-map /etc/network.cfg --subject mouse-17 --yes || fail init
sed -i 's/^# calibrate_s = .*/calibrate_s = 40.0/' /etc/spiked/rig.toml
spiked doctor /etc/spiked/rig.toml || fail doctor
began=$(date +%s)
spiked install-service --start || fail install-service
echo "FRESH service up after $(($(date +%s) - began)) s, kernels compiled"
for _ in $(seq 300); do
    units=$(spiked status 2>/dev/null | python3 -c 'import json, sys; s = json.load(sys.stdin)["streams"]["chip0"]["processes"].get("live") or {}; print(s.get("units") or 0)' 2>/dev/null || echo 0)
    [ "${units:-0}" -gt 0 ] && break
    sleep 1
done
systemctl --no-pager status spiked | head -24
[ "${units:-0}" -gt 0 ] || fail "no live units"
echo "FRESH $units live units"
for pid in $(pgrep -u spiked); do
    echo "FRESH $(ps -o cls=,rtprio=,ni= -p "$pid") $(tr '\0' ' ' < "/proc/$pid/cmdline" | grep -oE 'process.*run (acquire|record|live)|spiked run|jobs run' | head -1)"
done
chrt -p "$(pgrep -f 'processes.run acquire' | head -1)" | grep -q SCHED_RR || fail "acquire is not real-time"
for slice in spiked spikedjobs; do
    echo "FRESH $slice.slice: cpu.weight $(cat /sys/fs/cgroup/$slice.slice/cpu.weight), memory.high $(cat /sys/fs/cgroup/$slice.slice/memory.high)"
done
[ "$(cat /sys/fs/cgroup/spikedjobs.slice/cpu.weight)" = 1 ] && [ "$(cat /sys/fs/cgroup/spiked.slice/cpu.weight)" = 1000 ] || fail "slices"
spiked doctor /etc/spiked/rig.toml --quick --only ports --only service || fail "doctor of a running rig"

first=$(spiked status | python3 -c 'import json, sys; print(json.load(sys.stdin)["folder"])')
acquire=$(pgrep -f 'processes.run acquire' | head -1)
kill -STOP "$acquire"; sleep 14
pgrep -f 'processes.run acquire' | grep -qx "$acquire" && fail "a hanging acquire was not killed"
echo "FRESH a hanging acquire was replaced: $(journalctl -u spiked SPIKED_EVENT=hang --no-pager -o cat | tail -1)"
main=$(shown spiked.service MainPID)
kill -STOP "$main"; began=$(date +%s)
while [ "$(shown spiked.service NRestarts)" = 0 ]; do sleep 1; [ $(($(date +%s) - began)) -gt 240 ] && fail "the watchdog did not bark"; done
echo "FRESH the watchdog restarted a hanging supervisor after $(($(date +%s) - began)) s: $(journalctl -u spiked --no-pager -o cat | grep -i watchdog | tail -1)"
for _ in $(seq 120); do [ "$(spiked status 2>/dev/null | grep -c '"state": "recording"')" -gt 0 ] && break; sleep 1; done
second=$(spiked status | python3 -c 'import json, sys; print(json.load(sys.stdin)["folder"])') || fail "no session after the watchdog"
[ "$first" != "$second" ] || fail "the same session"
sleep 20

began=$(date +%s)
systemctl stop spiked.service
echo "FRESH stopped in $(($(date +%s) - began)) s: $(shown spiked.service Result), exit $(shown spiked.service ExecMainStatus)"
[ "$(shown spiked.service Result)" = success ] || fail "stop"
for _ in $(seq 600); do
    spiked jobs --folder /etc/spiked/rig.toml > /root/jobs.txt 2>&1
    grep -qE ' (running|queued) ' /root/jobs.txt || break
    sleep 2
done
cat /root/jobs.txt
[ "$(grep -c ' done ' /root/jobs.txt)" = 2 ] || fail "the jobs did not run"
for session in "$first" "$second"; do [ -s "$session/report.html" ] && [ -s "$session/chip0.nwb" ] || fail "$session"; done
ls -l "$second"
[ -z "$(find /data/sessions -perm /o=rwx)" ] || fail "others may read"
/opt/spiked/bin/python - "$first" "$second" <<'PY' || fail "the files do not open"
import sys, h5py
for folder in sys.argv[1:]:
    with h5py.File(f"{folder}/chip0.nwb", "r") as f:
        print("FRESH", folder, f["acquisition/ElectricalSeries/data"].shape, "invalid" if "intervals/invalid_times" in f else "no gaps")
PY
spiked install-service --check || fail check
spiked install-service --uninstall || fail uninstall
[ -s "$second/chip0.nwb" ] || fail "recordings touched"
echo "FRESH PASSED"
