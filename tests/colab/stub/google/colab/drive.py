import os
from pathlib import Path

def mount(mountpoint, force_remount=False):
    "The folder STUB_DRIVE as MyDrive; none set: the user says no"
    if not os.environ.get('STUB_DRIVE'): raise ValueError('mount failed')
    at = Path(mountpoint)
    at.mkdir(parents=True, exist_ok=True)
    Path(os.environ['STUB_DRIVE']).mkdir(parents=True, exist_ok=True)
    if not (at/'MyDrive').exists(): (at/'MyDrive').symlink_to(os.environ['STUB_DRIVE'])
    print(f'Mounted at {mountpoint}')
