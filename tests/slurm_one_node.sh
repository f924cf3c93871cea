#!/bin/bash
# A SLURM cluster with accounting on this machine, as root, without systemd or cgroups: slurm_one_node.sh start|stop FOLDER
# Needs: apt-get install -y --no-install-recommends slurm-wlm munge slurmdbd mariadb-server      (Debian 12: SLURM 22.05)
# After start: export SLURM_CONF=FOLDER/slurm.conf. Jobs in the partition `urgent` preempt those in `main`, the default.
set -eu
action=$1 S=$(realpath -m "$2") host=$(hostname -s)
cores=$(nproc --all) # `nproc` heeds OMP_NUM_THREADS
port=${PORT:-26817} # and the next two

wait_for() { # a command to succeed, for up to 30 seconds
    for _ in $(seq 60); do "$@" > /dev/null 2>&1 && return; sleep 0.5; done
    echo "no success within 30 seconds: $*" >&2
    exit 1
}

start() {
    mkdir -p "$S/state" "$S/spool" "$S/munge" "$S/db"
    chmod 755 "$S" "$S/munge"
    dd if=/dev/urandom of="$S/munge/key" bs=1 count=1024 status=none
    chmod 400 "$S/munge/key"
    munged --force --key-file="$S/munge/key" --socket="$S/munge/socket" --pid-file="$S/munge/pid" --log-file="$S/munge/log" \
        --seed-file="$S/munge/seed"
    start_accounting
    # A requeued job waits for cred_expire seconds.
    cat > "$S/slurm.conf" << C
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$S/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=$port
SlurmdPort=$((port + 1))
StateSaveLocation=$S/state
SlurmdSpoolDir=$S/spool
SlurmctldPidFile=$S/slurmctld.pid
SlurmdPidFile=$S/slurmd.pid
SlurmctldLogFile=$S/slurmctld.log
SlurmdLogFile=$S/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=60
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePass=$S/munge/socket
AccountingStoragePort=$((port + 2))
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores CoresPerSocket=$cores RealMemory=$(awk '/MemTotal/ {print int($2 / 1100)}' /proc/meminfo)
PartitionName=main Nodes=$host Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=$host PriorityTier=10 PreemptMode=OFF
C
    export SLURM_CONF=$S/slurm.conf
    slurmctld
    slurmd
    wait_for sh -c "sinfo -h -o %t | grep -q idle"
}

start_accounting() {
    chown mysql: "$S/db"
    mariadb-install-db --no-defaults --user=mysql --datadir="$S/db/data" --auth-root-authentication-method=normal > "$S/db.log" 2>&1
    mariadbd --no-defaults --user=mysql --datadir="$S/db/data" --socket="$S/db/socket" --pid-file="$S/db/pid" --skip-networking \
        --innodb-lock-wait-timeout=900 >> "$S/db.log" 2>&1 &
    wait_for mariadb --no-defaults -S "$S/db/socket" -u root -e "create database if not exists slurm_acct_db"
    cat > "$S/slurmdbd.conf" << C
AuthType=auth/munge
AuthInfo=socket=$S/munge/socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 2))
SlurmUser=root
LogFile=$S/slurmdbd.log
PidFile=$S/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
C
    chmod 600 "$S/slurmdbd.conf"
    MYSQL_UNIX_PORT="$S/db/socket" SLURM_CONF="$S/slurm.conf" slurmdbd
    wait_for grep -q started "$S/slurmdbd.log"
}

stop() {
    for name in slurmd.pid slurmctld.pid slurmdbd.pid db/pid munge/pid; do
        [ -f "$S/$name" ] || continue
        pid=$(cat "$S/$name")
        kill "$pid" 2> /dev/null || continue
        wait_for sh -c "! kill -0 $pid"
    done
}

$action
